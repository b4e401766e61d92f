"""The words that clients and backends share, and where they meet."""
