"""Kernels: what code generation maps integer layers to.

``spec`` says what a kernel computes and ``host`` what for; they load no TVM. ``convolution``,
``matmul`` and ``activation_matmul`` build the functions, with the help of ``tiles``
and ``emit``.
"""
