"""The files: ONNX graphs, engines, parity, benchmarks, verdicts and reports."""
