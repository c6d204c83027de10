"""Pure tensor maths of image formation: no files, tables or jobs."""
