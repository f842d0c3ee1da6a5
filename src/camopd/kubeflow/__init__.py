"""The KFP API as camopd uses it: the connection, submitting, watching. Nothing else of the package imports kfp."""
