variable "region" {
  description = "Where the buckets are."
  type        = string
}

variable "release_bucket" {
  description = "The bucket of releases and their promotions; a name that nobody else has."
  type        = string

  validation {
    condition     = can(regex("^[a-z0-9][a-z0-9-]{1,61}[a-z0-9]$", var.release_bucket))
    error_message = "A bucket's name has 3 to 63 characters of a-z, 0-9 and -."
  }
}

variable "artifact_bucket" {
  description = "The bucket of what MLflow keeps: pages, tables, specifications."
  type        = string

  validation {
    condition     = can(regex("^[a-z0-9][a-z0-9-]{1,61}[a-z0-9]$", var.artifact_bucket))
    error_message = "A bucket's name has 3 to 63 characters of a-z, 0-9 and -."
  }

  validation {
    condition     = var.artifact_bucket != var.release_bucket
    error_message = "MLflow may delete; releases must not be in its bucket."
  }
}

variable "policy_prefix" {
  description = "The names of the policies begin with this."
  type        = string
  default     = "compression"
}

variable "tags" {
  description = "Tags of everything that is made here."
  type        = map(string)
  default     = {}
}
