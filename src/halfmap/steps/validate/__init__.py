"""What a careful reviewer asks of a map: one report, with a light and a sentence for each finding."""
