"""Messages between server and clients, and how numbers in them are encoded."""

from fedss.wire.messages import (
    Message,
    WireFormat,
    decode_answer,
    decode_broadcast,
    decode_dealt,
    decode_request,
    decode_update,
    encode_answer,
    encode_broadcast,
    encode_request,
    encode_update,
    encoded_size,
    traffic,
)

__all__ = [
    "Message",
    "WireFormat",
    "decode_answer",
    "decode_broadcast",
    "decode_dealt",
    "decode_request",
    "decode_update",
    "encode_answer",
    "encode_broadcast",
    "encode_request",
    "encode_update",
    "encoded_size",
    "traffic",
]
