"""Passwords: Argon2id, a few at a time, and the same work for accounts that do not exist."""

import secrets
from threading import BoundedSemaphore

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

MIN_CHARS = 12
MAX_CHARS = 256

_HASHER = PasswordHasher()  # Argon2id with the library's RFC 9106 parameters, 64 MiB each
# Memory is what Argon2 costs: a burst of log-ins may not take the machine's.
_AT_A_TIME = BoundedSemaphore(2)
# Verified against when there is no such account, so that the answer takes as long.
_DECOY = _HASHER.hash(secrets.token_urlsafe(32))


def hashed(password: str) -> str:
    with _AT_A_TIME:
        return _HASHER.hash(password)


def is_right(password: str, stored: str) -> bool:
    """Whether `password` fits; an empty `stored` costs the same time and is never right."""
    if len(password) > MAX_CHARS:
        return False
    with _AT_A_TIME:
        try:
            return _HASHER.verify(stored or _DECOY, password) and bool(stored)
        except (VerificationError, InvalidHashError):
            return False


def objection(password: str, name: str) -> str:
    """Why `password` cannot be used, in a sentence; empty when it can."""
    if len(password) < MIN_CHARS:
        return f"A password needs at least {MIN_CHARS} characters."
    if len(password) > MAX_CHARS:
        return f"A password has at most {MAX_CHARS} characters."
    if len(set(password)) < 5 or name.lower() in password.lower():
        return "This password is too easy to guess: vary its characters and leave your name out."
    return ""
