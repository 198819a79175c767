"""The same questions, answered by a small fusion model of ALBEF's shape that ModeX adapters change."""
