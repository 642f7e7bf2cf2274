"""The steps of `data.prepare`: options, texts, events, filtering, sequences."""
