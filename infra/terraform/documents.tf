# The documents in ../s3 are used as they lie there, with the names of your buckets put in. No provider is needed to
# evaluate this file, so a test lets Terraform do so.
locals {
  roles = {
    publisher    = "policy.json"
    reader       = "reader.json"
    promoter     = "promoter.json"
    no-promotion = "no-promotion.json"
    mlflow       = "mlflow.json"
  }

  policies = {
    for role, file in local.roles : role => replace(
      replace(file("${path.module}/../s3/${file}"), "arn:aws:s3:::compressed-models", "arn:aws:s3:::${var.release_bucket}"),
      "arn:aws:s3:::mlflow-artifacts", "arn:aws:s3:::${var.artifact_bucket}"
    )
  }

  # For everybody, the account's administrators too: what is there is not written again.
  never_overwrite = jsondecode(replace(
    file("${path.module}/../s3/never-overwrite.json"), "arn:aws:s3:::compressed-models", "arn:aws:s3:::${var.release_bucket}"
  )).Statement

  lifecycle_rules = jsondecode(file("${path.module}/../s3/lifecycle.json")).Rules
}
