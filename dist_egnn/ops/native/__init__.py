"""The message MLP as a native library: C++, compiled once per instruction set, called by ctypes without the interpreter's lock."""
