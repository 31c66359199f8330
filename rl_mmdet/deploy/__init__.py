"""Taking a trained model away."""
from .plain_checkpoint import save_plain_checkpoint

__all__ = ['save_plain_checkpoint']
