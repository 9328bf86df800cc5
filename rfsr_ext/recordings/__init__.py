"""Recorded results: fixed protocols for networks that few machines have, and the small files of what they measured."""

from rfsr_ext.recordings.files import FOLDERS, Recording, read_recording, record, recorded, say_missing, write_recording
from rfsr_ext.recordings.protocols import PROTOCOLS, Protocol

__all__ = [
    "FOLDERS",
    "PROTOCOLS",
    "Protocol",
    "Recording",
    "read_recording",
    "record",
    "recorded",
    "say_missing",
    "write_recording",
]
