"""JSON schemas as people write them for structured output: made up from a seed, no two alike."""

from __future__ import annotations

import json
from collections.abc import Iterator
from random import Random
from typing import Any

Schema = dict[str, Any]

TOPICS = tuple(
    "invoice,weather report,patient record,job posting,recipe,flight booking,bug report,product review,library loan,support ticket,sensor reading,"
    "chess game,real estate listing,court decision,bank transfer,museum exhibit,school timetable,podcast episode,train delay".split(",")
)
# Also what a careless grammar trips over: spaces, quotes, escapes, other scripts, JSON schema's own words.
NAMES = tuple(
    "id,title,status,createdAt,updated_at,total_amount,currency,line-items,customer,email,first_name,lastName,age,isActive,tags,notes,quantity,price,"
    "address,city,postal_code,country,lat,lon,url,priority,score,comments,author,version,duration_minutes,start date,end date,größe,prix,日付,@type,"
    "$schema-version,x/y,a.b,type,enum,properties,required,said \"yes\",back\\slash,temperature°C,items,default,owner".split(",")
)
WORDS = tuple("open,closed,pending,low,medium,high,EUR,USD,red,dark blue,north,café,naïve,東京,n/a,none,A+,\"quoted\",a\\b,on/off,<b>".split(","))
PATTERNS = tuple(
    r"^[A-Z]{2,3}-\d{4}$ ^#[0-9a-f]{6}$ ^\d{1,2}\.\d{1,3}\.\d{1,4}$ ^[A-Z][a-z]{2,12}$ ^(yes|no|maybe)$ ^\+?[0-9]{6,12}$ ^[a-z]+(-[a-z0-9]+){0,3}$ "
    r"^([01]\d|2[0-3]):[0-5]\d$ ^[^\s@]{1,12}$ ^.{0,12}[0-9]{3}$".split()
)
FORMATS = ("date", "time", "date-time", "email", "uuid", "ipv4", "ipv6", "uri", "hostname", "duration")


class _Maker:
    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.definitions: Schema = {}

    def root(self) -> Schema:
        for name in self.random.sample(("address", "money", "Person 1", "geo/point", "time~span"), self.random.randint(0, 2)):
            self.definitions[name] = self.object(depth=1)
        if self.random.random() < 0.2:
            node = {"label": self.string(), "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2}}
            self.definitions["node"] = _closed(node, list(node))
        if self.random.random() < 0.9:
            schema = self.object(depth=2)
        else:
            schema = {"type": "array", "items": self.object(depth=1), "minItems": 1, "maxItems": 3}
        if self.random.random() < 0.3:
            schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": self.random.choice(TOPICS), **schema}
        return {**schema, "$defs": self.definitions} if self.definitions else schema

    def any(self, depth: int) -> Schema:
        if depth == 0 or self.random.random() < 0.55:
            return self.leaf()
        kinds = [self.object, self.object, self.array, self.array, self.union, self.mapping, self.both]
        return self.random.choice([*kinds, self.reference, self.reference] if self.definitions else kinds)(depth - 1)

    def leaf(self) -> Schema:
        schema = self.random.choice((self.string, self.string, self.choice, self.integer, self.number, self.simple))()
        if self.random.random() < 0.15:
            schema["description"] = f"Of the {self.random.choice(TOPICS)}; see \"{self.random.choice(NAMES)}\"."
        return schema

    def string(self) -> Schema:
        kind = self.random.randrange(5)
        if kind == 0:
            return {"type": "string", "pattern": self.random.choice(PATTERNS)}
        if kind == 1:
            return {"type": "string", "format": self.random.choice(FORMATS)}
        if kind == 2:
            return {"type": "string"}
        least = self.random.choice((0, 1, 3))
        return {"type": "string", **({"minLength": least} if least else {}), "maxLength": least + self.random.randint(5, 30)}

    def choice(self) -> Schema:
        words = self.random.sample(WORDS, self.random.randint(2, 5))
        kind = self.random.randrange(4)
        if kind == 0:
            return {"const": self.random.choice((words[0], 7, -2.5, True, None, [words[0], 1], {"k": words[0]}))}
        if kind == 1:
            return {"enum": [*words, self.random.randint(-9, 99), None]}
        return {"type": "string", "enum": words}

    def integer(self) -> Schema:
        low = self.random.choice((0, 1, -40, 1900))
        high = low + self.random.choice((3, 10, 150, 1_000_000))
        kind = self.random.randrange(4)
        if kind == 0:
            return {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": high}
        if kind == 1:
            return {"type": "integer", "minimum": low, "maximum": high, "multipleOf": self.random.choice((1, 2, 3))}
        return {"type": "integer", "minimum": low, **({"maximum": high} if kind == 2 else {})}

    def number(self) -> Schema:
        low, high = self.random.choice(((0, 1), (-90, 90), (-180.0, 180.0), (0.01, 9999.99), (35.5, 42)))
        if self.random.random() < 0.3:
            return {"type": "number", "exclusiveMinimum": low, "maximum": high}
        return {"type": "number", "minimum": low, "maximum": high}

    def simple(self) -> Schema:
        kind = self.random.randrange(4)
        if kind == 0:
            return {"type": ["string", "null"], "maxLength": 20}
        if kind == 1:
            return {"type": ["integer", "boolean", "null"], "minimum": 0, "maximum": 500}
        return {"type": "boolean"} if kind == 2 else {"type": "null"}

    def object(self, depth: int) -> Schema:
        properties = {name: self.any(depth) for name in self.random.sample(NAMES, self.random.randint(2, 4))}
        every = self.random.random() < 0.7
        return _closed(properties, [name for name in properties if every or self.random.random() < 0.6])

    def array(self, depth: int) -> Schema:
        if self.random.random() < 0.25:
            items = [self.any(depth) for _ in range(self.random.randint(2, 3))]
            return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
        least = self.random.randint(0, 2)
        return {"type": "array", "items": self.any(depth), "minItems": least, "maxItems": least + self.random.randint(1, 2)}

    def union(self, depth: int) -> Schema:
        if self.random.random() < 0.5:
            return {"anyOf": [self.any(depth), {"type": "null"}]}
        kinds = self.random.sample(("card", "cash", "transfer", "voucher"), 2)
        branches = [_closed({"kind": {"const": kind}, self.random.choice(NAMES): self.any(depth)}) for kind in kinds]
        return {self.random.choice(("anyOf", "oneOf")): branches}

    def mapping(self, depth: int) -> Schema:
        if self.random.random() < 0.4:
            return {"type": "object", "patternProperties": {"^x-[a-z]{1,8}$": self.leaf()}, "additionalProperties": False, "maxProperties": 3}
        return {"type": "object", "additionalProperties": self.leaf(), "minProperties": 1, "maxProperties": 3}

    def both(self, depth: int) -> Schema:
        """What is said twice holds twice."""
        names = self.random.sample(NAMES, 2)
        properties = {name: self.any(depth) for name in names}
        narrow = {"type": "object", "properties": {names[0]: properties[names[0]]}, "required": [names[0]]}
        return {"allOf": [narrow, {"type": "object", "required": [names[1]]}], **_closed(properties, [])}

    def reference(self, depth: int) -> Schema:
        name = self.random.choice(sorted(self.definitions))
        return {"$ref": "#/$defs/" + name.replace("~", "~0").replace("/", "~1").replace(" ", "%20")}


def _closed(properties: Schema, required: list[str] | None = None) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
    }


def made_up(count: int) -> list[Schema]:
    """The same ``count`` different schemas in every run."""
    found: dict[str, Schema] = {}
    seed = 0
    while len(found) < count:
        schema = _Maker(seed).root()
        found.setdefault(json.dumps(schema, sort_keys=True), schema)
        seed += 1
    return list(found.values())


def keywords(schema: Any) -> Iterator[str]:
    """Every keyword in use, as often as it is."""
    if isinstance(schema, dict):
        for name, value in schema.items():
            yield name
            if name in ("properties", "$defs", "patternProperties"):
                for inner in value.values():
                    yield from keywords(inner)
            elif name not in ("enum", "const"):
                yield from keywords(value)
    elif isinstance(schema, list):
        for inner in schema:
            yield from keywords(inner)
