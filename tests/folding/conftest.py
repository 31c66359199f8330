"""What tests of folding share: how a model runs."""
from collections.abc import Callable

import pytest
from torch import Tensor, nn


@pytest.fixture
def folds() -> Callable[[nn.Module, Tensor], bool]:
    """Whether some convolution folds its norm when the model runs: seen in the graph that it leaves."""
    def look(model: nn.Module, image: Tensor) -> bool:
        todo, seen = [model(image.clone().requires_grad_()).grad_fn], set()
        while todo:
            node = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if 'FoldedConvolution' in type(node).__name__:
                return True
            todo += [parent for parent, _ in node.next_functions]
        return False
    return look
