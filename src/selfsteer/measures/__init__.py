"""Numbers, pure: measures of preference data with intervals, judges' reports, gates."""
