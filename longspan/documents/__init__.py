"""Files and folders that a person names, as texts under their names. No torch, no engine."""
