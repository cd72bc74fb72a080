"""The command line ``pf``: calls, lists, describes and pings protoframe servers, which describe themselves.

A user of the public face; nothing else in the package knows of it.  ``pf --help`` answers without Twisted: only what
runs a command imports it (`protoframe.cli.running`), and only then.
"""
