"""PyTorch model → bundle: capture, quantise, write, check. `export.pipeline` tells the story; needs torch and onnx."""
