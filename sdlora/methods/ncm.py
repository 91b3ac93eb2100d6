"""Nearest class mean on the frozen backbone: nothing is trained, a class is the mean of its features."""

from sdlora.methods import frozen
from sdlora.methods.method import Method, keep_as_before

METHOD = Method(begin=frozen.begin, freeze=keep_as_before, targets=(), trains_head=False)
