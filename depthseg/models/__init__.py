"""Networks. They know tensors only: no path, no picture, no choice of device."""
