{{/* The file of `camopd sync`, as JSON. */}}
{{- define "camopd.syncFile" -}}
{{- $pools := include "camopd.pools" . -}}
{{- $file := dict "owner" (include "camopd.owner" .) "pipeline" .Values.pipeline.name "experiment" .Values.pipeline.experiment -}}
{{- $_ := set $file "version" (printf "%s-%s" .Chart.Version (sha256sum $pools | trunc 12)) -}}
{{- $_ := set $file "namespace" (ternary .Release.Namespace "" .Values.kfp.multiUser) -}}
{{- $_ := set $file "time_zone" .Values.kfp.timeZone -}}
{{- $_ := set $file "service_account" (include "camopd.serviceAccount" .) -}}
{{- $_ := set $file "pools" (fromJson $pools) -}}
{{- $schedules := list -}}
{{- range .Values.schedules -}}
{{- $entry := dict "name" .name "cron" .cron "follow" .follow "recipe" .recipe "parameters" (default (dict) .parameters) -}}
{{- $_ := set $entry "max_attempts" (default 3 .maxAttempts) -}}
{{- $_ := set $entry "again_for_new_teachers" (default false .againForNewTeachers) -}}
{{- $_ := set $entry "enabled" (ternary .enabled true (hasKey . "enabled")) -}}
{{- $schedules = append $schedules $entry -}}
{{- end -}}
{{- $_ := set $file "schedules" $schedules -}}
{{- toPrettyJson $file -}}
{{- end -}}
