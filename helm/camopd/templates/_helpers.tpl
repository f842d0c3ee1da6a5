{{/* Names. A Job's pod adds six letters to its name, so what is longest here, `<fullname>-test-stores`, has 62 of 63. */}}
{{- define "camopd.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "camopd.fullname" -}}
{{- $name := include "camopd.name" . -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Whose schedules are this release's: an alias of a parent chart has a fullname of its own. */}}
{{- define "camopd.owner" -}}
{{- printf "%s/%s" .Release.Namespace (include "camopd.fullname" .) -}}
{{- end -}}

{{/* The account of scheduled runs; empty is Kubeflow Pipelines' own. */}}
{{- define "camopd.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (ternary (include "camopd.fullname" .) "" .Values.serviceAccount.create) -}}
{{- end -}}

{{/* The account of hooks. */}}
{{- define "camopd.syncServiceAccount" -}}
{{- $own := ternary (printf "%s-sync" (include "camopd.fullname" .)) "default" .Values.sync.serviceAccount.create -}}
{{- .Values.sync.serviceAccount.name | default $own -}}
{{- end -}}

{{- define "camopd.kfpHost" -}}
{{- .Values.kfp.host | default (printf "http://ml-pipeline.%s.svc.cluster.local:8888" .Values.kfp.namespace) -}}
{{- end -}}

{{/* What a network policy selects by, also pods of runs. One label: Argo's Workflow object holds it once and again for each task. */}}
{{- define "camopd.policyLabel" -}}
camopd.io/release: {{ include "camopd.fullname" . }}
{{- end -}}

{{/* Labels that tell whose a pod is. */}}
{{- define "camopd.podLabels" -}}
app.kubernetes.io/name: {{ include "camopd.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/part-of: camopd
{{- end -}}

{{- define "camopd.labels" -}}
{{- with .Values.commonLabels }}
{{- toYaml . }}
{{ end -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{ include "camopd.podLabels" . }}
{{- end -}}

{{/* metadata: of a list (root, suffix of the name, component, own annotations). */}}
{{- define "camopd.metadata" -}}
{{- $root := index . 0 -}}
metadata:
  name: {{ include "camopd.fullname" $root }}{{ index . 1 }}
  namespace: {{ $root.Release.Namespace }}
  labels:
    {{- include "camopd.labels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ index . 2 }}
  {{- with merge (dict) (index . 3) $root.Values.commonAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}

{{/* An image by its digest, or by its tag, of a list (root, name in `images`). */}}
{{- define "camopd.image" -}}
{{- $root := index . 0 -}}
{{- $image := index $root.Values.images (index . 1) -}}
{{- $global := ($root.Values.global).imageRegistry -}}
{{- $registry := $global | default $root.Values.imageRegistry | default $image.registry | trimSuffix "/" -}}
{{- $version := ternary (printf "@%s" $image.digest) (printf ":%s" (default $root.Chart.AppVersion $image.tag)) (ne $image.digest "") -}}
{{- printf "%s/%s%s" $registry $image.repository $version -}}
{{- end -}}
