"""What is done to a model before it is compiled or leaves PyTorch."""
