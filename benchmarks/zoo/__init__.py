"""MMDetection's model zoo, tried out: which of its configs run with replaced backbones."""
