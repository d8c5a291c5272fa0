"""Our own runs, predicted: layouts that nothing was fitted on, trained on resident ranks and held against the model."""
