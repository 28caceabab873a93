"""The forward pass, one decoder layer at a time, from the checkpoint as it lies: the model is never held whole."""
