"""ONNX in, ONNX out: layers, calibration, quantization and the integer reference."""
