"""The message MLP as a native library: C++ compiled once per instruction set, called through ctypes with the interpreter's lock released."""
