"""Taking a trained model away."""
from .delta import DeltaInfo, apply_delta, delta_info, save_delta, state_hash
from .onnx_graph import Exported, export_onnx
from .plain_checkpoint import save_plain_checkpoint

__all__ = ['DeltaInfo', 'Exported', 'apply_delta', 'delta_info', 'export_onnx', 'save_delta', 'save_plain_checkpoint',
           'state_hash']
