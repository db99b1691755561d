"""What users say of answers: kept (store), looked at and taken out (the command), and learned from (retrain)."""
