"""Starts SGLang's server beside a CPU build of torch: `python -m sglang_cpu_server`, with the server's flags.

PyPI's torchvision links libtorch_cuda, so its operators do not load beside a CPU torch; its Python half still
looks up the schemas of two of them on import, and stops where they are missing. sglang imports transformers,
and that imports torchvision. Declared here, the two are found; nothing that serves a text model calls them.

The declarations stand at module level because sglang starts its scheduler and its detokenizer by
multiprocessing's `spawn`, which imports the main module again in each child before anything else.
"""

import runpy

import torch

_torchvision = torch.library.Library("torchvision", "DEF")  # named: the schemas go when it is collected
_torchvision.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_torchvision.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
