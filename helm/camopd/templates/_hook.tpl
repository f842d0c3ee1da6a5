{{/*
The pod of a hook or a test: metadata and spec. Of a dict: root, component, account, command (a list), stores (it is given what
pods of runs are given, and asks the stores; else it asks Kubeflow Pipelines).
*/}}
{{- define "camopd.hookPod" -}}
{{- $root := .root -}}
{{- $values := $root.Values -}}
metadata:
  labels:
    {{- with merge (dict) $values.sync.podLabels (ternary $values.pools.labels (dict) .stores) }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
    {{- include "camopd.podLabels" $root | nindent 4 }}
    {{- include "camopd.policyLabel" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .component }}
    # A proxy would not end with the container.
    sidecar.istio.io/inject: "false"
  {{- with $values.sync.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{ include "camopd.hookSpec" . }}
{{- end -}}

{{- define "camopd.hookSpec" -}}
{{- $root := .root -}}
{{- $values := $root.Values -}}
{{- $token := include "camopd.projectedToken" . -}}
spec:
  restartPolicy: Never
  serviceAccountName: {{ .account }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  {{- with $values.imagePullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  {{- with $values.sync.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- range $name := list "nodeSelector" "tolerations" "affinity" }}
  {{- with get $values.sync $name }}
  {{ $name }}:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- end }}
  securityContext:
    {{- $restricted := dict "runAsNonRoot" true "seccompProfile" (dict "type" "RuntimeDefault") }}
    {{- toYaml (mergeOverwrite (deepCopy $values.sync.podSecurityContext) $restricted) | nindent 4 }}
  containers:
    - name: camopd
      image: {{ include "camopd.image" (list $root "core") }}
      imagePullPolicy: {{ $values.imagePullPolicy }}
      command: {{ toJson .command }}
      {{- with include "camopd.hookEnv" . | trim }}
      env:
        {{- . | nindent 8 }}
      {{- end }}
      securityContext:
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities: {drop: [ALL]}
      {{- with $values.sync.resources }}
      resources:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: config, mountPath: /etc/camopd, readOnly: true}
        {{- if $values.caBundle.configMap }}
        - {name: ca, mountPath: /etc/camopd-ca, readOnly: true}
        {{- end }}
        {{- if $token }}
        - {name: kfp-token, mountPath: /var/run/secrets/kubeflow/pipelines, readOnly: true}
        {{- end }}
  volumes:
    - {name: tmp, emptyDir: {}}
    - {name: config, configMap: {name: {{ include "camopd.fullname" $root }}}}
    {{- if $values.caBundle.configMap }}
    - {name: ca, configMap: {name: {{ $values.caBundle.configMap }}}}
    {{- end }}
    {{- if $token }}
    - name: kfp-token
      projected:
        sources:
          - serviceAccountToken: {path: token, audience: pipelines.kubeflow.org, expirationSeconds: 3600}
    {{- end }}
{{- end -}}

{{/* Not empty where the pod shows Kubeflow Pipelines a token of its service account. */}}
{{- define "camopd.projectedToken" -}}
{{- if and .root.Values.kfp.multiUser (not .root.Values.kfp.tokenSecret.name) (not .stores) }}yes{{ end -}}
{{- end -}}

{{- define "camopd.hookEnv" -}}
{{- $values := .root.Values -}}
{{- $shared := ternary (include "camopd.shared" .root | fromJson) (dict) .stores -}}
{{- $secrets := default (dict) $shared.secrets -}}
{{- $env := default (dict) $shared.env -}}
{{- if not .stores -}}
{{- $_ := set $env "KFP_HOST" (include "camopd.kfpHost" .root) -}}
{{- with $values.kfp.uiHost }}{{ $_ := set $env "KF_PIPELINES_UI_ENDPOINT" . }}{{ end -}}
{{- with $values.kfp.tokenSecret }}{{ if .name }}{{ $_ := set $secrets "KFP_TOKEN" (printf "%s/%s" .name .key) }}{{ end }}{{ end -}}
{{- if include "camopd.projectedToken" . }}{{ $_ := set $env "KF_PIPELINES_SA_TOKEN_PATH" "/var/run/secrets/kubeflow/pipelines/token" }}{{ end -}}
{{- end -}}
{{- if $values.caBundle.configMap -}}
{{- if not .stores }}{{ $_ := set $env "KFP_CA_FILE" (printf "/etc/camopd-ca/%s" $values.caBundle.key) }}{{ end -}}
{{- range $name := list "AWS_CA_BUNDLE" "REQUESTS_CA_BUNDLE" "SSL_CERT_FILE" -}}
{{- if not (or (hasKey $env $name) (hasKey $secrets $name)) }}{{ $_ := set $env $name (printf "/etc/camopd-ca/%s" $values.caBundle.key) }}{{ end -}}
{{- end -}}
{{- end -}}
{{- range $name, $value := $env }}
- {name: {{ $name }}, value: {{ $value | quote }}}
{{- end }}
{{- range $name, $reference := $secrets }}
{{- $parts := splitList "/" $reference }}
- name: {{ $name }}
  valueFrom: {secretKeyRef: {name: {{ first $parts }}, key: {{ last $parts }}}}
{{- end }}
{{- with $values.sync.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* A Job of a hook. Of a dict: root, suffix, hook, command. */}}
{{- define "camopd.hookJob" -}}
{{- $root := .root -}}
{{- $sync := $root.Values.sync -}}
{{- $hook := dict "helm.sh/hook" .hook "helm.sh/hook-weight" "0" "helm.sh/hook-delete-policy" "before-hook-creation,hook-succeeded" -}}
apiVersion: batch/v1
kind: Job
{{ include "camopd.metadata" (list $root .suffix "sync" $hook) }}
spec:
  backoffLimit: {{ int64 $sync.backoffLimit }}
  activeDeadlineSeconds: {{ int64 $sync.activeDeadlineSeconds }}
  ttlSecondsAfterFinished: {{ int64 $sync.ttlSecondsAfterFinished }}
  template:
    {{- $pod := dict "root" $root "component" "sync" "account" (include "camopd.syncServiceAccount" $root) "command" .command "stores" false }}
    {{- include "camopd.hookPod" $pod | nindent 4 }}
{{- end -}}
