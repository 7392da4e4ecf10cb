"""A dataset on storage: shards, fields beside them, what identifies them, and their verification."""
