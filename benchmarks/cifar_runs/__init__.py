"""CIFAR-10 as the papers used it, small: networks with and without replaced blocks, trained alike."""
