{{/* What is wrong with the values, all of it at once and with what to do. The schema refuses the rest. */}}
{{- define "camopd.check" -}}
{{- $found := concat (include "camopd.problems.schedules" . | fromJsonArray) (include "camopd.problems.pools" . | fromJsonArray) (include "camopd.problems.release" . | fromJsonArray) -}}
{{- if $found -}}
{{- fail (printf "\n\n%d problem(s) in the values of %s:\n  - %s\n" (len $found) .Chart.Name (join "\n  - " $found)) -}}
{{- end -}}
{{- end -}}

{{- define "camopd.problems.schedules" -}}
{{- $found := list -}}
{{- $names := list -}}
{{- range $i, $schedule := .Values.schedules -}}
{{- $where := printf "schedules[%d]" $i -}}
{{- $fields := regexSplit "\\s+" (trim .cron) -1 -}}
{{- if ne (len $fields) 6 -}}
{{- $hint := ternary (printf "write \"0 %s\"" (trim .cron)) "such as \"0 0 2 * * *\" for two in the night" (eq (len $fields) 5) -}}
{{- $found = append $found (printf "%s.cron: %q has %d fields, and Kubeflow Pipelines wants six, seconds first: %s" $where .cron (len $fields) $hint) -}}
{{- end -}}
{{- if not (regexMatch "^(models:/[^@#/]+(@[^@#]+|#[^=]+=.+)|s3://[a-z0-9][a-z0-9.-]+(/.*)?)$" .follow) -}}
{{- $found = append $found (printf "%s.follow: %q is not understood; write models:/NAME@ALIAS, models:/NAME#TAG=VALUE or s3://bucket/prefix" $where .follow) -}}
{{- end -}}
{{- if has .name $names -}}
{{- $found = append $found (printf "%s.name: there are two schedules %q; give each its own name" $where .name) -}}
{{- end -}}
{{- $names = append $names .name -}}
{{- end -}}
{{- toJson $found -}}
{{- end -}}

{{/* Of a list (where, env, secrets). */}}
{{- define "camopd.problems.variables" -}}
{{- $where := index . 0 -}}
{{- $found := list -}}
{{- range $name, $value := index . 1 -}}
{{- if or (regexMatch "(?i)(^|_)(SECRET|PASSWORD|TOKEN|CREDENTIALS?|API_KEY|ACCESS_KEY)(_|$)" $name) (regexMatch "://[^/@\\s]*:[^/@\\s]+@" (toString $value)) -}}
{{- $found = append $found (printf "%senv.%s looks like a secret: put it into a Secret, and its name and key into %ssecrets" $where $name $where) -}}
{{- end -}}
{{- end -}}
{{- range $name, $reference := index . 2 -}}
{{- if not (regexMatch "^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[-._a-zA-Z0-9]+$" $reference) -}}
{{- $found = append $found (printf "%ssecrets.%s: write name/key of a Secret that exists, never its value" $where $name) -}}
{{- end -}}
{{- end -}}
{{- toJson $found -}}
{{- end -}}

{{- define "camopd.problems.pools" -}}
{{- $found := list -}}
{{- range $name := list "cpu" "inference" "training" "colocated" -}}
{{- $pool := get $.Values.pools $name -}}
{{- $where := printf "pools.%s." $name -}}
{{- with $pool.accelerator -}}
{{- if ne (empty .name) (eq (int64 .count) 0) -}}
{{- $found = append $found (printf "%saccelerator: name and count belong together; give both, such as name: nvidia.com/gpu, count: 1, or neither" $where) -}}
{{- end -}}
{{- end -}}
{{- if and $pool.priorityClass (not $pool.queue) -}}
{{- $found = append $found (printf "%spriorityClass is Kueue's, so it needs %squeue: Kubeflow Pipelines and TrainJobs pass no other priority class on; without Kueue set it in Argo's workflowDefaults or in the TrainingRuntime" $where $where) -}}
{{- end -}}
{{- $found = concat $found (include "camopd.problems.variables" (list $where $pool.env $pool.secrets) | fromJsonArray) -}}
{{- end -}}
{{- with .Values.pools.training -}}
{{- if and (gt (int64 .nodes) 1) (not .runtime) -}}
{{- $found = append $found "pools.training.runtime: several nodes need a runtime of Kubeflow Trainer, such as torch-distributed" -}}
{{- else if and (eq (int64 .nodes) 1) (or .runtime .resources .serviceAccount) -}}
{{- $found = append $found "pools.training: runtime, resources and serviceAccount belong to several nodes; set nodes above 1, or leave them out" -}}
{{- end -}}
{{- end -}}
{{- toJson $found -}}
{{- end -}}

{{- define "camopd.problems.release" -}}
{{- $found := include "camopd.problems.variables" (list "" .Values.env .Values.secrets) | fromJsonArray -}}
{{- if and .Values.output (not (regexMatch "^s3://[a-z0-9][a-z0-9.-]+(/.*)?$" .Values.output)) -}}
{{- $found = append $found (printf "output: %q is not an object store's prefix; pods share no disk, so write s3://bucket/prefix" .Values.output) -}}
{{- end -}}
{{- if .Values.requireDigest -}}
{{- $used := list "core" -}}
{{- range $name, $pool := omit .Values.pools "labels" -}}
{{- if or (ne $name "colocated") $pool.enabled }}{{ $used = append $used $pool.image }}{{ end -}}
{{- end -}}
{{- range $name := sortAlpha (uniq $used) -}}
{{- if not (get $.Values.images $name).digest -}}
{{- $found = append $found (printf "images.%s.digest: requireDigest is set; give sha256:... of the image (skopeo inspect tells it)" $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and .Values.networkPolicy.enabled (not .Values.networkPolicy.kubernetesApi.cidrs) -}}
{{- $found = append $found "networkPolicy.kubernetesApi.cidrs: pods of runs ask the Kubernetes API; name its addresses (kubectl get endpoints kubernetes), such as [10.0.0.1/32]" -}}
{{- end -}}
{{- toJson $found -}}
{{- end -}}
