"""What is compiled, which setup.cfg cannot say; all the rest stands there.

Without a compiler, or elsewhere than on Linux, the package is the same, and copies small files slower.
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "protoframe.files._native",
            ["protoframe/files/_native.c"],
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            py_limited_api=True,
            optional=True,
        )
    ]
)
