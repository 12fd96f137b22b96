"""Data: rows of chats to token ids and loss labels."""
