"""Study files (TOML) that come with exmy: what to sweep. `exmy sweep` without a file takes a first-look study from here."""
