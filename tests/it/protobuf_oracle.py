"""Writes descriptor sets and records with Google's own implementation, and what each record holds by it.

Arguments: folder. Writes FOLDER/new.binpb (proto3) and FOLDER/old.binpb (proto2), and prints JSON lines: schema, value (base64),
expected (column to value; null for the record where some column cannot hold its value).
"""

import base64
import json
import math
import random
import sys
from pathlib import Path

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, timestamp_pb2, wrappers_pb2

F = descriptor_pb2.FieldDescriptorProto
SCALARS = {
    "double": F.TYPE_DOUBLE, "float": F.TYPE_FLOAT, "int64": F.TYPE_INT64, "uint64": F.TYPE_UINT64, "int32": F.TYPE_INT32,
    "fixed64": F.TYPE_FIXED64, "fixed32": F.TYPE_FIXED32, "bool": F.TYPE_BOOL, "string": F.TYPE_STRING,
    "uint32": F.TYPE_UINT32, "sfixed32": F.TYPE_SFIXED32, "sfixed64": F.TYPE_SFIXED64, "sint32": F.TYPE_SINT32,
    "sint64": F.TYPE_SINT64,
}


def field(message, name, number, kind, repeated=False, oneof=None, optional=False):
    made = message.field.add(name=name, number=number)
    made.label = F.LABEL_REPEATED if repeated else F.LABEL_OPTIONAL
    if kind in SCALARS:
        made.type = SCALARS[kind]
    elif kind == "bytes":
        made.type = F.TYPE_BYTES
    else:
        word, made.type_name = kind.split(" ")
        made.type = {"enum": F.TYPE_ENUM, "message": F.TYPE_MESSAGE, "group": F.TYPE_GROUP}[word]
    if oneof is not None:
        made.oneof_index = oneof
    if optional:
        made.proto3_optional = True
        made.oneof_index = len(message.oneof_decl)
        message.oneof_decl.add(name="_" + name)
    return made


def event(message, package):
    """The same fields for both syntaxes: a number of each kind, and all that is special."""
    field(message, "customer_id", 1, "string")
    field(message, "at", 2, "int64")
    message.oneof_decl.add(name="payment")
    field(message, "card", 40, "string", oneof=0)
    field(message, "voucher", 41, "sint64", oneof=0)
    field(message, "gift", 42, f"message .{package}.Basket", oneof=0)
    field(message, "cash", 43, "bytes", oneof=0)
    for number, kind in enumerate(SCALARS, start=10):
        field(message, "a_" + kind, number, kind)
    field(message, "basket", 50, f"message .{package}.Basket")
    field(message, "colour", 51, f"enum .{package}.Colour")
    field(message, "when", 52, "message .google.protobuf.Timestamp")
    field(message, "maybe", 53, "message .google.protobuf.DoubleValue")
    field(message, "name", 54, "message .google.protobuf.StringValue")
    field(message, "sure", 55, "message .google.protobuf.BoolValue")
    field(message, "tags", 56, "string", repeated=True)
    field(message, "blob", 57, "bytes")
    field(message, "parent", 536870911, f"message .{package}.Outer.Event")


def basket(message, package):
    field(message, "size", 1, "int32")
    field(message, "total", 2, "double")
    field(message, "inner", 3, f"message .{package}.Inner")


def build(pool, package, syntax):
    file = descriptor_pb2.FileDescriptorProto(name=package + ".proto", package=package, syntax=syntax)
    file.dependency.extend(["google/protobuf/timestamp.proto", "google/protobuf/wrappers.proto"])
    colour = file.enum_type.add(name="Colour")
    for number, name in enumerate(["NONE", "RED", "GREEN"]):
        colour.value.add(name=name, number=number)
    inner = file.message_type.add(name="Inner")
    field(inner, "code", 1, "string")
    field(inner, "level", 2, "sint32")
    basket(file.message_type.add(name="Basket"), package)
    outer = file.message_type.add(name="Outer")
    outer.nested_type.add(name="Other")
    made = outer.nested_type.add(name="Event")
    event(made, package)
    if syntax == "proto3":
        field(made, "a_optional", 60, "int64", optional=True)
    else:
        group = made.nested_type.add(name="Extra")
        field(group, "depth", 1, "int32")
        field(made, "extra", 60, f"group .{package}.Outer.Event.Extra")
    pool.Add(file)
    return file


def rest(package):
    """A message with fields that the readers' schema does not have."""
    file = descriptor_pb2.FileDescriptorProto(name=package + "_rest.proto", package=package + "_rest", syntax="proto2")
    message = file.message_type.add(name="Rest")
    field(message, "number", 100, "sint64")
    field(message, "text", 101, "string")
    field(message, "eight", 102, "fixed64")
    field(message, "four", 103, "float")
    group = message.nested_type.add(name="Group")
    field(group, "deep", 1, "string")
    inner = group.nested_type.add(name="Deeper")
    field(inner, "x", 2, "int32")
    field(group, "deeper", 3, f"group .{package}_rest.Rest.Group.Deeper")
    field(message, "group", 104, f"group .{package}_rest.Rest.Group")
    return file


EDGES = {
    "string": ["", "x", "é\0ü", "a" * 300],
    "bool": [True, False],
    "double": [0.0, -0.0, 1.5, -1e300, math.nan, math.inf],
    "float": [0.0, 0.5, -3.25, math.nan],
}
for kind, bits, signed in [("64", 64, True), ("32", 32, True), ("u64", 64, False), ("u32", 32, False)]:
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    for name in SCALARS:
        unsigned = name.startswith("u") or name in ("fixed32", "fixed64")
        if name.endswith(kind[-2:]) and unsigned != signed:
            EDGES[name] = [low, low + 1, 0, 1, 127, 128, 300, high - 1, high]


def fill(message, chance, depth=0):
    for of in message.DESCRIPTOR.fields:
        if chance.random() < 0.5:
            continue
        value = getattr(message, of.name)
        if of.type in (F.TYPE_MESSAGE, F.TYPE_GROUP) and not of.is_repeated:
            full = of.message_type.full_name
            if full == timestamp_pb2.Timestamp.DESCRIPTOR.full_name:
                value.seconds = chance.choice([0, 1, -1, 1_700_000_000, -62_135_596_800, 253_402_300_799])
                value.nanos = chance.choice([0, 1, 999_999, 1_000_000, 999_999_999])
            elif full.startswith("google.protobuf."):
                value.SetInParent()
                kind = {1: "double", 8: "bool", 9: "string"}[value.DESCRIPTOR.fields[0].type]
                if chance.random() < 0.7:
                    value.value = chance.choice(EDGES[kind])
            elif depth < 2:
                value.SetInParent()
                fill(value, chance, depth + 1)
        elif of.is_repeated:
            value.extend(["t"] * chance.randrange(3))
        elif of.type == F.TYPE_BYTES:
            setattr(message, of.name, b"\xff\x00")
        elif of.type == F.TYPE_ENUM:
            setattr(message, of.name, chance.choice([0, 1, 2] + ([77] if not of.enum_type.is_closed else [])))
        else:
            kind = next(name for name, number in SCALARS.items() if number == of.type)
            setattr(message, of.name, chance.choice(EDGES[kind]))
    if depth == 0:
        message.customer_id = message.customer_id or "c"
        message.at = chance.randrange(1 << 40)


def held(message, path):
    """What a column holds, by Google's own accessors."""
    name, _, inner = path.partition(".")
    of = message.DESCRIPTOR.fields_by_name[name]
    if of.has_presence and not message.HasField(name):
        return None
    value = getattr(message, name)
    if inner:
        return held(value, inner)
    if of.type == F.TYPE_ENUM:
        known = of.enum_type.values_by_number.get(value)
        return known.name if known else str(value)
    if of.type == F.TYPE_MESSAGE:
        if of.message_type.full_name == "google.protobuf.Timestamp":
            return value.seconds * 1000 + value.nanos // 1_000_000
        value = value.value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def columns(descriptor, prefix="", above=()):
    for of in descriptor.fields:
        path = prefix + of.name
        if of.is_repeated or of.type == F.TYPE_BYTES:
            continue
        if of.type in (F.TYPE_MESSAGE, F.TYPE_GROUP) and not of.message_type.full_name.startswith("google.protobuf."):
            if of.message_type.full_name not in above:
                yield from columns(of.message_type, path + ".", (*above, of.message_type.full_name))
        else:
            yield path


def main():
    folder = Path(sys.argv[1])
    chance = random.Random(20)
    for schema, syntax in [("new", "proto3"), ("old", "proto2")]:
        pool = descriptor_pool.DescriptorPool()
        imported = []
        for module in (timestamp_pb2, wrappers_pb2):
            proto = descriptor_pb2.FileDescriptorProto()
            module.DESCRIPTOR.CopyToProto(proto)
            pool.Add(proto)
            imported.append(proto)
        package = "shop." + schema
        file = build(pool, package, syntax)
        extra = rest(package)
        pool.Add(extra)
        written = descriptor_pb2.FileDescriptorSet(file=[*imported, file])
        (folder / (schema + ".binpb")).write_bytes(written.SerializeToString())
        kind = message_factory.GetMessageClass(pool.FindMessageTypeByName(package + ".Outer.Event"))
        unknown = message_factory.GetMessageClass(pool.FindMessageTypeByName(package + "_rest.Rest"))
        paths = list(columns(kind.DESCRIPTOR, above=(kind.DESCRIPTOR.full_name,)))
        for _ in range(400):
            pieces = []
            # Pieces of one message, one after the other, are the message.
            for _ in range(chance.choice([1, 1, 1, 2, 3])):
                message = kind()
                fill(message, chance)
                pieces.append(message.SerializeToString())
                if chance.random() < 0.3:
                    more = unknown(number=chance.randrange(-9, 9), text="x", eight=7, four=1.5)
                    more.group.deep = "y"
                    more.group.deeper.x = 3
                    pieces.append(more.SerializeToString())
            value = b"".join(pieces)
            message = kind.FromString(value)
            expected = {path: held(message, path) for path in paths}
            fits = all(not isinstance(v, int) or -(1 << 63) <= v < 1 << 63 for v in expected.values())
            line = {"schema": schema, "value": base64.b64encode(value).decode(), "expected": expected if fits else None}
            print(json.dumps(line))


main()
