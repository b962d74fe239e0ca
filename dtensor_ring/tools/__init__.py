"""Plans for people and programs: exact totals without plans, drawings of 80 columns, and the same facts as values for JSON."""
