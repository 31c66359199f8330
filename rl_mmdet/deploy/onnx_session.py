"""An ONNX graph of a backbone and neck, run by onnxruntime on the CPU."""
from pathlib import Path

import torch
from torch import Tensor


class OnnxSession:
    """Normalised images (N, 3, H, W) to feature maps, by a graph with the input ``images``.

    Args:
        file: the graph. Torch's number of threads is onnxruntime's, too.
    """

    def __init__(self, file: Path) -> None:
        import onnxruntime
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are raised, and told by the caller
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(file, options, providers=['CPUExecutionProvider'])

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        """The graph's feature maps, in the order of its outputs.

        Raises:
            ValueError: the graph can't take these images.
        """
        import onnxruntime
        try:
            maps = self.session.run(None, {'images': images.numpy()})
        except onnxruntime.capi.onnxruntime_pybind11_state.OnnxRuntimeException as error:
            raise ValueError(str(error)) from error
        return tuple(map(torch.from_numpy, maps))
