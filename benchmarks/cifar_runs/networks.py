"""The networks, and what is done to their blocks."""
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock

from rl_mmdet.replacement import replace_blocks_

ARMS = {
    'baseline': None,
    'rl-v1': dict(gradient=dict(mode='detached', every=8)),
    'rl-v1-coupled': dict(gradient=dict(mode='coupled')),
    'rl-v1-attention': dict(operator=dict(type='FullBlock', only='attn'), gradient=dict(mode='coupled')),
    'rl-v2': dict(operator=dict(type='SlimBlock', width=0.25)),
    'rl-v2-every-1': dict(operator=dict(type='SlimBlock', width=0.25), gradient=dict(every=1)),
    'rl-v2-coupled': dict(operator=dict(type='SlimBlock', width=0.25), gradient=dict(mode='coupled')),
    'rl-v2-transform': dict(fusion=dict(type='TransformFusion', share=0.2), gradient=dict(mode='coupled')),
    'skip': dict(operator=dict(type='Skip')),
    'shared': dict(fusion=dict(type='SharedWeights'), gradient=dict(mode='coupled')),
    'shorter': None,
    'narrower': None,
}
"""The replacement's settings besides the plan, by the arm's name; None replaces nothing."""
ONLY_FOR = {'rl-v1-attention': 'vit'}
"""Arms that fit one network alone."""
AS_CHEAP_AS = {'shorter': 'skip', 'narrower': 'rl-v2-coupled'}
"""What else saves cost: fewer steps, and narrower stages, until a training costs what that of another arm does."""
CLASSES = 10


class ResNet(nn.Module):
    """The ResNet of 6n+2 layers for images of 32×32: three stages of n BasicBlocks, shortcuts without parameters.

    Args:
        n: blocks of a stage.
        width: channels of the first stage; each of the others has twice as many as the one before it.

    Source: "Deep Residual Learning for Image Recognition", arXiv 1512.03385, section 4.2.
    """

    def __init__(self, n: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(*(BasicBlock(width, width) for _ in range(n)))
        self.layer2 = _smaller_stage(n, width)
        self.layer3 = _smaller_stage(n, 2 * width)
        self.fc = nn.Linear(4 * width, CLASSES)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, 32, 32) to (B, classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def _smaller_stage(n: int, channels: int) -> nn.Sequential:
    """A stage that halves the size of its maps and doubles their ``channels``."""
    return nn.Sequential(BasicBlock(channels, 2 * channels, 2, Subsampling()),
                         *(BasicBlock(2 * channels, 2 * channels) for _ in range(n - 1)))


class Subsampling(nn.Module):
    """The shortcut without parameters (option A): every other row and column, and as many channels of zeros again."""

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, x.shape[1]))


class ViT(nn.Module):
    """A plain vision transformer for images of 32×32, with the mean of its tokens in the place of a class token.

    Args:
        depth: blocks.
        channels: of each token; a head of the attention has 64 of them or, where these are fewer, all.
        patch: side of the square that becomes a token, in pixels.

    Source: "An Image is Worth 16x16 Words", arXiv 2010.11929.
    """

    def __init__(self, depth: int, channels: int, patch: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, channels, patch, patch)
        self.position = nn.Parameter(torch.empty(1, (32 // patch) ** 2, channels))
        self.blocks = nn.Sequential(*(ViTBlock(channels) for _ in range(depth)))
        self.norm = nn.LayerNorm(channels)
        self.head = nn.Linear(channels, CLASSES)
        nn.init.trunc_normal_(self.position, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, 32, 32) to (B, classes)."""
        tokens = self.patches(x).flatten(2).mT + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(1))


class ViTBlock(nn.Module):
    """Attention and MLP, each behind a LayerNorm and added to its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn = Attention(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    """Self-attention of several heads."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = max(1, channels // 64)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


NETWORKS = {
    'resnet32': lambda width: ResNet(5, width),
    'resnet20': lambda width: ResNet(3, width),
    'vit': lambda width: ViT(12, 12 * width),
    'resnet110': lambda width: ResNet(18, width),
}
"""By name, the most important first; each takes a width, 16 in the paper's ResNets."""


def build(network: str, arm: str, seed: int, width: int, k: int) -> tuple[nn.Module, list[str]]:
    """A network with the arm's replacement, and the names of its replaced blocks.

    What all arms of a width have starts from the same weights.
    """
    torch.manual_seed(seed)
    model = NETWORKS[network](width)
    if ARMS[arm] is None:
        return model, []
    report = replace_blocks_(model, dict(ARMS[arm], plan=dict(type='EveryKth', k=k)))
    return model, [row.name for row in report.rows if row.replaced]
