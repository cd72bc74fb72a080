"""The messages of both gRPCs: protobuf's classes, made from a descriptor as generated code makes them.

Knows protobuf alone; there is no generated code to be kept, and no generator to be installed.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

__all__ = ["Data", "Number", "Text"]


def _message(name: str, field: str, type_: int) -> Any:
    """The class of a message with one field."""
    file = descriptor_pb2.FileDescriptorProto(
        name=f"benchmarks/{name}.proto",
        package="benchmarks",
        syntax="proto3",
        message_type=[
            {"name": name, "field": [{"name": field, "number": 1, "type": type_, "label": 1}]},
        ],
    )
    descriptor = descriptor_pool.Default().AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(descriptor.message_types_by_name[name])


Text = _message("Text", "text", descriptor_pb2.FieldDescriptorProto.TYPE_STRING)
Data = _message("Data", "data", descriptor_pb2.FieldDescriptorProto.TYPE_BYTES)
Number = _message("Number", "number", descriptor_pb2.FieldDescriptorProto.TYPE_INT64)
