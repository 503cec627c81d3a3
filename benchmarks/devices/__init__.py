"""Where kernels run: a module has one device, with its kernels, its timer and its limits."""
