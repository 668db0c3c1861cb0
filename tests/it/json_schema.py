"""Checks messages against JSON Schemas: one a line on standard input, {"schema": FILE, "message": …}.

A schema has to refuse a message that lacks a required key or has one more, and to name no key that no message has.
"""

import json
import sys
from collections import defaultdict

from jsonschema import Draft202012Validator

faults, validators, seen = [], {}, defaultdict(set)
for line in sys.stdin:
    case = json.loads(line)
    file, message = case["schema"], case["message"]
    if file not in validators:
        with open(file) as text:
            schema = json.load(text)
        Draft202012Validator.check_schema(schema)
        validators[file] = Draft202012Validator(schema)
    validator = validators[file]
    faults += [f"{file}: {error.json_path}: {error.message}" for error in validator.iter_errors(message)]
    for key in validator.schema["required"]:
        if validator.is_valid({name: value for name, value in message.items() if name != key}):
            faults.append(f"{file}: takes a message without {key}")
    if validator.schema["additionalProperties"] is False and validator.is_valid(message | {"one more": 1}):
        faults.append(f"{file}: takes a key that it does not know")
    seen[file] |= message.keys()
for file, validator in validators.items():
    never = validator.schema["properties"].keys() - seen[file]
    faults += [f"{file}: no message has {key}" for key in never]
if not seen:
    faults.append("there is no message")
print("\n".join(faults[:50]))
sys.exit(1 if faults else 0)
