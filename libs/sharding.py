"""Which shard an entity lives in. The same everywhere and for ever: changing it would scatter what is stored."""

from hashlib import blake2b


def shard_of(tenant: str, entity: str, shards: int) -> int:
    """The shard, 0 to shards - 1, that holds everything of an entity."""
    digest = blake2b(f"{tenant}\x1f{entity}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) % shards
