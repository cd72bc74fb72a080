"""The servers that ``twistd`` lists.  Imported by every use of twistd, hence nothing but these lines."""

from twisted.application.service import ServiceMaker

upper = ServiceMaker(
    "protoframe upper-case server",
    "protoframe.servers.upper",
    "Answer in capital letters: the first protoframe server.",
    "pf-upper",
)
serve = ServiceMaker(
    "protoframe server",
    "protoframe.servers.serve",
    "Serve any protoframe Protocol: --protocol package.module:Name.",
    "pf-serve",
)
queue = ServiceMaker(
    "protoframe message queue",
    "protoframe.servers.queue",
    "Serve durable message queues from a directory: --data DIRECTORY.",
    "pf-queue",
)
files = ServiceMaker(
    "protoframe server of files",
    "protoframe.servers.files",
    "Serve the files below a directory, verified at both ends: --root DIR.",
    "pf-files",
)
