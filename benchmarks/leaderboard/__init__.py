"""Peers at equal bytes in one run: this library's caches, kvpress's and transformers' own.

    make leaderboard

`protocol` says what is asked and what files hold it, `continuing` measures any cache that a
transformers model takes, `ours` and `peers` name the caches, `page` makes table and picture.
`kvpress_worker` runs in an environment of its own, whose pins clash with this library's: it, and
what it imports, import nothing of `less_cache`.
"""
