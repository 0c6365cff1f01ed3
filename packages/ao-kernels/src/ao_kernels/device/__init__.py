"""What runs on the device, in Triton's language; the modules above launch it."""
