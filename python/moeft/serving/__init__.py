"""llama.cpp's server as a process of its own: started on a GGUF file, asked over loopback, stopped."""

from moeft.serving.client import Client
from moeft.serving.options import ServeOptions
from moeft.serving.process import Server
from moeft.serving.smoke import SmokeTest, smoke_test

__all__ = ["Client", "ServeOptions", "Server", "SmokeTest", "smoke_test"]
