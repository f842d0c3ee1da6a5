{{/* The pools file (pipelines/pools.example.toml) that the values say, as JSON. What is empty is left out. */}}

{{/* What all pools share. */}}
{{- define "camopd.shared" -}}
{{- $env := dict -}}
{{- $_ := set $env "CAMOPD_OUTPUT" .Values.output -}}
{{- $_ := set $env "AWS_ENDPOINT_URL_S3" .Values.s3.endpoint -}}
{{- $_ := set $env "AWS_DEFAULT_REGION" .Values.s3.region -}}
{{- $_ := set $env "S3_ADDRESSING_STYLE" .Values.s3.addressingStyle -}}
{{- $_ := set $env "MLFLOW_TRACKING_URI" .Values.mlflow.trackingUri -}}
{{- range $name, $value := $env }}{{ if not $value }}{{ $_ := unset $env $name }}{{ end }}{{ end -}}
{{- $secrets := dict -}}
{{- with .Values.s3.existingSecret }}{{ if .name }}
{{- $_ := set $secrets "AWS_ACCESS_KEY_ID" (printf "%s/%s" .name .accessKeyKey) -}}
{{- $_ := set $secrets "AWS_SECRET_ACCESS_KEY" (printf "%s/%s" .name .secretKeyKey) -}}
{{- end }}{{ end -}}
{{- with .Values.mlflow.existingSecret }}{{ if .name }}{{ $_ := set $secrets "MLFLOW_TRACKING_TOKEN" (printf "%s/%s" .name .tokenKey) }}{{ end }}{{ end -}}
{{- with .Values.webhook.existingSecret }}{{ if .name }}{{ $_ := set $secrets "CAMOPD_WEBHOOK_URL" (printf "%s/%s" .name .key) }}{{ end }}{{ end -}}
{{- with .Values.teacher.existingSecret }}{{ if .name }}{{ $_ := set $secrets "CAMOPD_TEACHER_API_KEY" (printf "%s/%s" .name .key) }}{{ end }}{{ end -}}
{{- $shared := dict "env" (merge (dict) .Values.env $env) "secrets" (merge (dict) .Values.secrets $secrets) -}}
{{- $_ := set $shared "image_pull_secrets" .Values.imagePullSecrets -}}
{{- $_ := set $shared "image_pull_policy" .Values.imagePullPolicy -}}
{{- $policy := ternary (include "camopd.policyLabel" . | fromYaml) (dict) .Values.networkPolicy.enabled -}}
{{- $_ := set $shared "labels" (merge (dict) $policy .Values.pools.labels) -}}
{{- with .Values.caBundle }}{{ if .configMap }}{{ $_ := set $shared "ca_bundle" (printf "%s/%s" .configMap .key) }}{{ end }}{{ end -}}
{{- include "camopd.compact" $shared -}}
{{- end -}}

{{/* One pool, of a list (root, values of the pool). */}}
{{- define "camopd.pool" -}}
{{- $root := index . 0 -}}
{{- $values := index . 1 -}}
{{- $pool := dict "image" (include "camopd.image" (list $root $values.image)) -}}
{{- range $ours, $theirs := dict "cpu" "cpu" "memory" "memory" "shm" "shm" "scratch" "scratch" "selectors" "nodeSelector" "tolerations" "tolerations" "node_affinity" "nodeAffinity" "labels" "labels" "queue" "queue" "priority_class" "priorityClass" "env" "env" "secrets" "secrets" "retries" "retries" "timeout_minutes" "timeoutMinutes" "runtime" "runtime" "resources" "resources" "service_account" "serviceAccount" -}}
{{- $_ := set $pool $ours (get $values $theirs) -}}
{{- end -}}
{{- with $values.accelerator -}}
{{- $_ := set $pool "accelerator" .name -}}
{{- $_ := set $pool "count" .count -}}
{{- end -}}
{{- if gt (int64 (default 1 $values.nodes)) 1 -}}
{{- $_ := set $pool "nodes" $values.nodes -}}
{{- $_ := set $pool "runtime_kind" $values.runtimeKind -}}
{{- end -}}
{{- include "camopd.compact" $pool -}}
{{- end -}}

{{/* A table without what is empty or zero, as JSON. */}}
{{- define "camopd.compact" -}}
{{- $full := dict -}}
{{- range $key, $value := . }}{{ if $value }}{{ $_ := set $full $key $value }}{{ end }}{{ end -}}
{{- toJson $full -}}
{{- end -}}

{{- define "camopd.pools" -}}
{{- $pools := dict "all" (include "camopd.shared" . | fromJson) -}}
{{- range $name := list "cpu" "inference" "training" "colocated" -}}
{{- $values := get $.Values.pools $name -}}
{{- if or (ne $name "colocated") $values.enabled -}}
{{- $_ := set $pools $name (include "camopd.pool" (list $ $values) | fromJson) -}}
{{- end -}}
{{- end -}}
{{- toJson $pools -}}
{{- end -}}
