#!/usr/bin/env python3
"""Writes split.csv: `pip install xxhash && python3 split.py > split.csv`.

An implementation of the weighted split of its own, from the formula alone, against which Serin's is tested.
"""

from math import log

from xxhash import xxh3_64_intdigest as xxh3_64

HEAD = """\
# Test vectors of the weighted split: which backend an identity belongs to.
#
#   seed(backend)  = xxh3_64(salt ++ "\\0" ++ backend)          all text in UTF-8
#   u(backend)     = (xxh3_64(identity, seed(backend)) + 0.5) / 2^64
#   score(backend) = weight / -ln(u(backend))                  the highest wins; weight 0 never does
#
# entry_share_ppm: the share of the canary, in parts per million, at which this identity enters it. It does not depend
# on the weights: r = ln(u(canary)) / ln(u(stable)), and the share is r / (1 + r).
#
# The backends are shop-stable and shop-canary. Made by split.py beside this file, not by Serin. Frozen: a row may be
# added, and none may change, since every user in a rollout would be dealt again.
salt,identity,stable_weight,canary_weight,backend,entry_share_ppm"""

SALTS = ["shop", "checkout-2026"]
IDENTITIES = [
    "user-1", "user-2", "u", "Ann", "ann", "jane@example.com", "spaces inside",  # the bytes as they are
    "0", "7", "007", "42", "18446744073709551615",  # numbers are text
    "Jürg", "Ju\u0308rg", "用户-1", "пользователь", "🦜",  # UTF-8, not normalised
    "192.0.2.1", "2001:db8::1", "f81d4fae-7dec-11d0-a765-00a0c91e6bf6",
    "x" * 16, "x" * 17, "x" * 128, "x" * 129, "x" * 240, "x" * 241, "x" * 1025,  # xxh3 changes its way at these lengths
]
WEIGHTS = [(95, 5), (50, 50), (1, 9999), (9999, 1), (1, 0), (1_000_000, 1_000_000)]


def u(salt, backend, identity):
    seed = xxh3_64(f"{salt}\0{backend}".encode())
    return (xxh3_64(identity.encode(), seed=seed) + 0.5) / 2**64


def rows():
    for salt in SALTS:
        for identity in IDENTITIES:
            stable, canary = (log(u(salt, backend, identity)) for backend in ("shop-stable", "shop-canary"))
            r = canary / stable
            for stable_weight, canary_weight in WEIGHTS:
                backend = "shop-stable" if stable_weight / -stable > canary_weight / -canary else "shop-canary"
                yield salt, identity, stable_weight, canary_weight, backend, round(1e6 * r / (1 + r))


print(HEAD)
for row in rows():
    print(*row, sep=",")
