"""Methods of others that AlignSAM is compared with: PerSAM, and SAMed and MSA, trained here."""
